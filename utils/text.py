"""Make text from users and data sets safe for a terminal, a log, a table or a figure."""


def printable(text: object) -> str:
    """Return the text with spaces for control characters, except line breaks, and for marks that change its direction.

    Bytes of a file name that are not valid text become \\udcXX.
    """
    kept = "\n\u200c\u200d"  # Persian, Hindi and emoji need the two joiners
    characters = str(text).encode(errors="backslashreplace").decode()
    return "".join(character if character.isprintable() or character in kept else " " for character in characters)


def one_line(text: object) -> str:
    """Return the `printable` text on one line."""
    return " ".join(printable(text).split())
