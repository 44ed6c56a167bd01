"""`python -m pascaline`, and with it `torchrun ... -m pascaline run RECIPE`."""

from pascaline.cli import main

main()
