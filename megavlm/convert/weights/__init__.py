"""Tables that map weight names and shapes both ways."""
