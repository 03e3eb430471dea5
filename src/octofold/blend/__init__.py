"""Blend: members become one submission, an estimate that holds, and a ledger. Start reading at `assembly`."""
