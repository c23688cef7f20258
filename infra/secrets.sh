#!/usr/bin/env bash
# Makes the secrets of a namespace, with random passwords and keys, as far as they are not there yet. Nothing is ever replaced: the
# raters' pseudonyms hang on their salt, and PostgreSQL keeps the password that it began with.
#
#     infra/secrets.sh            # with SeaweedFS in the cluster (overlays kind and on-prem)
#     infra/secrets.sh --aws      # S3 rights come from IAM roles: no S3 secret at all
#
# NAMESPACE (rankloop) is where, KUBECTL (kubectl) is how. No value is shown, or on any command line.
set -euo pipefail
cd "$(dirname "$0")"
NAMESPACE=${NAMESPACE:-rankloop}
KUBECTL=${KUBECTL:-kubectl}

random() { openssl rand -hex "$1"; }
there() { $KUBECTL --namespace "$NAMESPACE" get secret "$1" --output name >/dev/null 2>&1; }
# make NAME: an opaque secret of the KEY=VALUE lines of standard input, unless there is one
make() {
    if there "$1"; then
        echo "secret/$1 is there already"
    else
        $KUBECTL --namespace "$NAMESPACE" create secret generic "$1" --from-env-file=/dev/stdin
    fi
}

make rankloop-postgres <<<"POSTGRES_PASSWORD=$(random 24)"
make rankloop-mlflow-server <<<"MLFLOW_AUTH_ADMIN_USERNAME=admin
MLFLOW_AUTH_ADMIN_PASSWORD=$(random 16)
MLFLOW_FLASK_SERVER_SECRET_KEY=$(random 32)"
make rankloop-mlflow <<<"MLFLOW_TRACKING_USERNAME=rankloop-stage
MLFLOW_TRACKING_PASSWORD=$(random 16)"
make rankloop-raters <<<"RANKLOOP_RATER_SALT=$(random 32)"

[ "${1:-}" = --aws ] && exit
# What SeaweedFS knows and what each pod gets of it belong together: all of these are made, or none.
if there rankloop-seaweedfs; then
    echo "secret/rankloop-seaweedfs is there already, and the S3 keys with it"
    exit
fi
identities=$(cat components/seaweedfs/identities.json)
for who in stage admin reader mlflow backup; do
    name=rankloop-s3-$who
    [ "$who" = stage ] && name=rankloop-s3    # so the compiled graph calls it
    if there "$name"; then
        echo "secret/$name is there, but rankloop-seaweedfs, which must know its key, is not: delete it, then run this again" >&2
        exit 65
    fi
    key=$(random 10) secret=$(random 20) upper=$(tr a-z A-Z <<<"$who")
    identities=${identities//"\${${upper}_KEY}"/$key}
    identities=${identities//"\${${upper}_SECRET}"/$secret}
    make "$name" <<<"AWS_ACCESS_KEY_ID=$key
AWS_SECRET_ACCESS_KEY=$secret"
done
$KUBECTL --namespace "$NAMESPACE" create secret generic rankloop-seaweedfs --from-file=s3.json=/dev/stdin <<<"$identities"
