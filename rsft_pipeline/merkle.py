"""Merkle: one hash that stands for a checkpoint's whole training set, row by row.

Belongs here: what of a row is hashed, and how the hashes of all rows become one. Not: which rows a checkpoint
was trained on (steps/rows.py), nor what to report if they have changed (audit/verify.py).

Hashes are as in RFC 6962, section 2.1 (SHA-256; a leaf's input begins with byte 0, an inner node's with byte 1,
so that neither can pass for the other), over the rows in the order of their candidate ids.
"""

import hashlib

import pyarrow as pa

# SQL of a prompt's part of a leaf, computed separately because many rows share a prompt.
PROMPT = "sha256(concat_ws(chr(10), prompt_id, chat::VARCHAR, text))"

# SQL of a row's leaf, 64 hex digits, over the columns of rows.ACCEPTED: everything of the row that training uses, and
# the score it was accepted with. One item per line and the free text last, so that different rows never give the same
# string; numbers have 18 significant digits, enough to tell any two doubles apart.
LEAF = """sha256(chr(0) || concat_ws(chr(10), candidate_id, round, format('{:.17e}', weight),
    coalesce(format('{:.17e}', score), 'NULL'), array_to_string(token_ids, ','), prompt_hash, text))"""


def root(leaves: pa.ChunkedArray) -> str:
    """The hash of the tree over these leaves, 64 hex digits; for no leaves, the SHA-256 of the empty string.

    Args:
        leaves: strings of 64 hex digits, in the order of their candidate ids.
    """
    level = b"".join(bytes.fromhex(chunk) for chunk in _text(leaves))
    if not level:
        return hashlib.sha256().hexdigest()
    sha256 = hashlib.sha256
    while len(level) > 32:
        # The last of an odd number moves up unchanged: the same tree as splitting at the largest power of two.
        paired = len(level) - len(level) % 64
        alone = level[paired:]
        level = b"".join([sha256(b"\1" + level[i : i + 64]).digest() for i in range(0, paired, 64)]) + alone
    return level.hex()


def _text(leaves: pa.ChunkedArray):
    """The leaves' digits, concatenated chunk by chunk, without a Python object for each."""
    for chunk in leaves.chunks:
        if len(chunk):
            width = 8 if chunk.type == pa.large_string() else 4
            offsets = memoryview(chunk.buffers()[1]).cast("q" if width == 8 else "i")
            start, end = offsets[chunk.offset], offsets[chunk.offset + len(chunk)]
            yield str(memoryview(chunk.buffers()[2])[start:end], "ascii")
