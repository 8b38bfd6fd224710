"""Detection heads that are trained on a student's features beside its own; they never become part of the student."""
