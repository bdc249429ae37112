"""Serve a bundle over HTTP, and call such a server.

``options`` says what a server may do, ``server`` runs it, ``client`` calls it. Extra: ``serve``.
"""
