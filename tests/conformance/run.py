"""run.py HOST PORT: a route that echoes, with certificates for P-256 and RSA; PORT + 1 the same with ALPN.

Prints a table. Fails when something is heard that is neither what the standard wants nor known."""

import sys

from cases import CASES
from known import KNOWN


def listen(function, where):
    try:
        return function(where)
    except Exception as error:  # the driver's own
        return f"(the driver: {error!r})"


def main():
    where = (sys.argv[1], int(sys.argv[2]))
    chosen = sys.argv[3:]
    bad = 0
    print("| what | says | heard |")
    print("| --- | --- | --- |")
    for name, source, wanted, function in CASES:
        if chosen and not any(part in name for part in chosen):
            continue
        heard = listen(function, where)
        if heard in wanted:
            verdict = heard
        elif KNOWN.get(name, ("", ""))[0] == heard:
            verdict = f"**{heard}**, not {' or '.join(wanted)}: {KNOWN[name][1]}"
        else:
            bad += 1
            verdict = f"**{heard}**, not {' or '.join(wanted)}: UNKNOWN"
        print(f"| {name} | {source} | {verdict} |", flush=True)
    sys.exit(1 if bad else 0)


main()
