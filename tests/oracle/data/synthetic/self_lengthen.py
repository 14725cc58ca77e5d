"""Self-Lengthen's pieces as plain loops over characters, words and tables."""

import re
import unicodedata

CLOSERS = "\"'”’)]"
FULL, FULL_CLOSERS = "。！？", "”’」』）"


def sentences(text):
    """Cut behind a line break, behind a sentence's end that white space follows, or a full stop."""
    parts, start, i = [], 0, 0
    while i < len(text):
        end = None
        if text[i] == "\n":
            end = i + 1
        elif text[i] in ".!?…":
            j = i + 1
            while j < len(text) and text[j] in ".!?…":
                j += 1
            while j < len(text) and text[j] in CLOSERS:
                j += 1
            if j < len(text) and text[j].isspace():
                end = j
            else:
                i = max(j, i + 1)
                continue
        elif text[i] in FULL:
            j = i + 1
            while j < len(text) and text[j] in FULL:
                j += 1
            while j < len(text) and text[j] in FULL_CLOSERS:
                j += 1
            end = j
        if end is None:
            i += 1
            continue
        while end < len(text) and text[end].isspace():
            end += 1
        parts.append(text[start:end])
        start = i = end
    if start < len(text):
        parts.append(text[start:])
    return parts


def words(text):
    """Numbers, runs of letters, single signs."""
    level = unicodedata.normalize("NFKC", text).casefold()
    found, kind = [], None
    for sign in level:
        if re.match(r"\d", sign):
            now = "number"
        elif re.match(r"[^\W_]", sign):
            now = "letters"
        else:
            now = None
        if now is not None and now == kind:
            found[-1] += sign
        elif not sign.isspace():
            found.append(sign)
        kind = now
    return found


def split(text):
    parts = sentences(text)
    middle = -(-len(parts) // 2)
    return "".join(parts[:middle]), "".join(parts[middle:])


def head(text, numerator, denominator):
    """The first numerator/denominator of the sentences, rounded down, at least one."""
    parts = sentences(text)
    many = len(parts) * numerator // denominator
    return "".join(parts[: many if many else 1]).rstrip()


def repeated(seen, window):
    earlier, again, total = [], 0, 0
    for start in range(len(seen)):
        if start + window > len(seen):
            break
        run = list(seen[start : start + window])
        total += 1
        again += run in earlier
        earlier.append(run)
    return again / total if total else 0.0


def in_order(one, other):
    """Longest common subsequence by its table."""
    table = [[0] * (len(other) + 1) for _ in range(len(one) + 1)]
    for i, a in enumerate(one, 1):
        for j, b in enumerate(other, 1):
            best = max(table[i - 1][j], table[i][j - 1])
            table[i][j] = max(best, table[i - 1][j - 1] + 1) if a == b else best
    return table[-1][-1]


def refusal(response, longer, ended, alphabet, *, factor, endings, window, most_repeated, kept):
    """The first reason, in the order of the gate."""
    if not ended:
        return "cut"
    if longer == "" or longer[-1:] not in endings:
        return "ending"
    for sign in longer:
        if sign not in alphabet:
            return "characters"
    after, before = words(longer), words(response)
    if repeated(after, window):
        return "duplicated"
    if repeated(after, 3) > most_repeated:
        return "repetitive"
    if in_order(before, after) < kept * len(before):
        return "lost"
    if len(after) <= factor * len(before):
        return "short"
    return None


def learned(lengths, chance, bias):
    found = []
    for length, number in zip(lengths, chance, strict=True):
        share = sum(other > length for other in lengths) / len(lengths)
        found.append(number >= bias * share**3)
    return found


def without(text, share, chance):
    """Sentences whose number reaches the share; the first one if there is none."""
    parts = sentences(text)
    left = [part for part, number in zip(parts, chance, strict=True) if not number < share]
    return "".join(left if left else parts[:1]).strip()
