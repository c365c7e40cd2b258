"""One Redis: connections, what its errors mean, and the plain lock."""
