"""``python -m shoal.config > docs/cluster-yaml.md`` writes the reference page anew."""

from shoal.config.reference import reference_page

if __name__ == "__main__":
    print(reference_page(), end="")
