"""What came of studies, as one page for people: figures, tables, and the verdicts first."""
