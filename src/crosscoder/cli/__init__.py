"""The command line: `crosscoder demo | train | evaluate | diff | doctor`."""
