"""Offline programs that make data sets, on Apache Beam (extra `curation`)."""
