"""What users do before and after training; each tool of tools/ is a thin command line over one of these rooms."""
