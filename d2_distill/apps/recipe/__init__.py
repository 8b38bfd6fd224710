"""Configs of a teacher, a student and the student with its teacher, made from the data."""
