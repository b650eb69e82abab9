"""Results as people see them: terminal, tables and HTML."""
