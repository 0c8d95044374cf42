"""The audit pages: what rounds did, as web pages. Served on loopback, without scripts."""
