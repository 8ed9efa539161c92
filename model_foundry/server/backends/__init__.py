"""What computes: one token stream a request, whoever makes it."""
