"""The papers' tables as commands: read (tables), run cell by cell (cells), shown beside the printed numbers (shown)."""
