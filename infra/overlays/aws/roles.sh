#!/usr/bin/env bash
# Makes the IAM roles that the service accounts assume (IRSA), and `rankloop-reader`, which people of the account may assume, with the
# rights of iam/*.json. Run again, it brings them up to date.
#
#     infra/overlays/aws/roles.sh CLUSTER
#
# It takes account, region and OIDC provider from the aws command line and the cluster, and prints what it does.
set -euo pipefail
cd "$(dirname "$0")"
CLUSTER=${1:?usage: roles.sh CLUSTER}
AWS=${AWS:-aws}
BUCKET=${BUCKET:-}

account=$($AWS sts get-caller-identity --query Account --output text)
issuer=$($AWS eks describe-cluster --name "$CLUSTER" --query cluster.identity.oidc.issuer --output text)
bucket=${BUCKET:-rankloop-$account}
filled() { sed -e "s/rankloop-111122223333/$bucket/g" -e "s/111122223333/$account/g" -e "s|OIDC_PROVIDER|${issuer#https://}|g" "$@"; }
for who in stage mlflow backup reader; do
    [ "$who" = reader ] && trusted=people || trusted=pods
    trust=$(filled -e "s/SERVICE_ACCOUNT/rankloop-$who/" iam/trust-$trusted.json)
    $AWS iam create-role --role-name "rankloop-$who" --assume-role-policy-document "$trust" >/dev/null 2>&1 ||
        $AWS iam update-assume-role-policy --role-name "rankloop-$who" --policy-document "$trust"
    $AWS iam put-role-policy --role-name "rankloop-$who" --policy-name rankloop --policy-document "$(filled "iam/$who.json")"
    echo "role rankloop-$who: s3://$bucket, by $trusted"
done
