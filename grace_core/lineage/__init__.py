"""Where a model came from, and what came of a data set: from manifests to a graph people can read.

`graph` is the typed graph and its JSON, `collect` builds it from manifests, `find` finds what a
user named, `forward` follows a data set to its models; `text`, `picture` and `page` show a graph;
`published` takes out of it what belongs to one machine.
"""
