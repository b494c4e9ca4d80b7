"""The order of the suite: what takes longest begins first, so that no process waits for it at the end."""


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name != "test_notebooks.py")
