"""`python -m steppe.data.prepare RECIPE_JSON DIRECTORY [PARENT]`: a preparation in a separate process."""

import sys

from steppe.data.prepare import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
