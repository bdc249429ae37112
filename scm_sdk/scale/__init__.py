"""Batch generation of many images on one machine or a cluster, in shards that any rerun reproduces."""
