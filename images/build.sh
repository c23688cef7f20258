#!/bin/sh
# Builds both images and writes beside them what they hold: `make images BASE_IMAGE=...`. README.md tells what each variable is for.
set -eu
cd "$(dirname "$0")/.."
docker=${DOCKER:-docker}
case "${BASE_IMAGE:-}" in
*@sha256:????????????????????????????????????????????????????????????????) ;;
sha256:????????????????????????????????????????????????????????????????) ;; # an image of this machine, by its ID
*)
    echo "BASE_IMAGE = '${BASE_IMAGE:-}' is not pinned: give name@sha256:DIGEST, or the ID (sha256:...) of an image of this machine." >&2
    echo "  A tag can name another image tomorrow. 'docker pull python:3.11-slim-bookworm' prints the digest of today's." >&2
    exit 65
    ;;
esac
inputs=images/inputs
clean() { find "$inputs" -type f ! -name .gitignore -delete; }
trap clean EXIT
trap 'exit 130' INT TERM
clean
if [ -n "${CA_BUNDLE:-}" ]; then cp -L "$CA_BUNDLE" "$inputs/ca.pem"; fi
for wheel in ${WHEELS:-}; do cp -l "$wheel" "$inputs/" 2>/dev/null || cp "$wheel" "$inputs/"; done

version=$(sed -n 's/^version = "\(.*\)"$/\1/p' pyproject.toml)
revision=${REVISION:-$(git describe --always --abbrev=40 --exclude '*' --dirty)}
for image in data train; do
    name=${IMAGE_PREFIX:-rankloop/python-}$image:${TAG:-$version}
    began=$(date +%s)
    # shellcheck disable=SC2086 # several options
    $docker build -f "images/$image.Containerfile" -t "$name" --build-arg "BASE_IMAGE=$BASE_IMAGE" \
        --build-arg "PIP_INDEX_URL=${PIP_INDEX_URL:-https://pypi.org/simple}" --build-arg "VERSION=$version" \
        --build-arg "REVISION=$revision" --build-arg "SOURCE=${SOURCE:-}" ${BUILD_OPTIONS:-} .
    mkdir -p "images/sbom/$image"
    container=$($docker create "$name")
    $docker cp "$container:/usr/share/sbom/." "images/sbom/$image/"
    $docker rm "$container" >/dev/null
    size=$($docker image inspect -f '{{.Size}}' "$name")
    echo "$name: $((size / 1000000)) MB, built in $(($(date +%s) - began)) s; what it holds: images/sbom/$image/"
done
