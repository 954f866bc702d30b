from jobs.sweep.driver import cli

cli()
