"""What plugin authors test with, and what the demonstration is built from. Public; imports pytest nowhere at the top."""
