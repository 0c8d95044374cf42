"""Audit: questions about what was done, answered from what is recorded.

Belongs here: following, proving, replaying and revoking what rounds have recorded. Not: anything that a
round needs in order to run, nor how an answer is shown (cli/audit.py, web/).

Every answer is data (dataclasses of plain values), and except for `diff` from one snapshot of the store (reading.py),
even while rounds go on. Only `revoke` writes.
"""
