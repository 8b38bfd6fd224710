"""Measures of a model beside its accuracy."""
