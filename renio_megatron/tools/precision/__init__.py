"""What a precision does to the method."""
