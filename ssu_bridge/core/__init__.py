"""What a call is, without any framework: its arguments, its description and the rules they follow."""
