"""What do the launches behind the table published for the MI355X take?

Compiles in full, on any machine, what the published rules choose for each of its cells, with
the stages of every policy, and writes the rows that `published.launches` reads.
"""

import argparse
import sys

from moelab import published, records, sweep


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default=str(published.LAUNCHES))
    parser.add_argument("--store", default="rows")
    given = parser.parse_args()
    rows = sweep.run(published.questions(), given.store, full=True)
    records.export(rows, given.out)
    print(rows.groupby(["kernel", "num_stages", "status"]).size())
    return 0


if __name__ == "__main__":
    sys.exit(main())
