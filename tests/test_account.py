"""The account of a job, and names in messages."""

from being_vl.account import Account
from being_vl.names import show_name


def test_an_account_counts_all_that_was_seen():
    account = Account("images", 785)
    assert account.describe() == "images: 785 seen, 785 used, 0 left out"
    account.left_out["hidden"] += 7
    account.left_out["not an image"] += 20
    assert account.seen == 812
    assert account.describe() == "images: 812 seen, 785 used, 27 left out (20 not an image, 7 hidden)"
    assert Account.from_json(account.to_json()) == account


def test_a_name_in_a_message_is_short_and_printable():
    assert show_name("a/b.png") == "a/b.png"
    assert show_name("a\n\x00\x1b[31m\udcff.png") == "a\\n\\x00\\x1b[31m\\udcff.png"
    assert len(show_name("x" * 100_000)) <= 200
    assert show_name("é…中") == "é…中"
