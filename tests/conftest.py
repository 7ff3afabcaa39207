"""For all tests: signals as in a terminal."""

import signal

# A shell gives the jobs that it starts with `&` an ignored SIGINT, which every process they start inherits.
signal.signal(signal.SIGINT, signal.default_int_handler)
