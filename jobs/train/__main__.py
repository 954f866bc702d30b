from jobs.train.driver import cli

cli()
