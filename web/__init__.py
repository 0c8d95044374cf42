"""The audit pages: what rounds did, for people who would rather look than query. On loopback, without scripts."""
