"""What a run is: the schema of its configuration, the tables of models and stages, cross checks and
the command line.
"""
