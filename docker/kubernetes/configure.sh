#!/bin/sh
# Make docker/kubernetes/site: what this service is at one place, with random secrets and a self-signed certificate.
#   docker/kubernetes/configure.sh cpu|gpu HOST_NAME s3://BUCKET[/PREFIX]     nothing that is there is changed
#   IMAGE_PREFIX=registry.example.org/medsora- IMAGE_TAG=1 docker/kubernetes/configure.sh ...
# Then: kubectl apply -k docker/kubernetes/site
set -eu
cd "$(dirname "$0")"
usage="usage: docker/kubernetes/configure.sh cpu|gpu HOST_NAME s3://BUCKET[/PREFIX]"
[ $# -eq 3 ] || { echo "$usage" >&2 && exit 2; }
case $1 in cpu) worker=worker-cpu ;; gpu) worker=worker-cuda ;; *) echo "$usage" >&2 && exit 2 ;; esac
case $3 in s3://?*) ;; *) echo "$usage" >&2 && exit 2 ;; esac
prefix=${IMAGE_PREFIX:-medsora-}
tag=${IMAGE_TAG:-local}
umask 077
mkdir -p site/secrets

random() {
    head -c 64 /dev/urandom | base64 | tr -dc 'A-Za-z0-9' | head -c 40
}
for name in redis_password postgres_password; do
    [ -e "site/secrets/$name" ] && continue
    random >"site/secrets/$name"
    echo "Made site/secrets/$name."
done
if [ ! -e site/secrets/secrets_keys ]; then
    head -c 32 /dev/urandom | base64 | tr '+/' '-_' | tr -d '\n' >site/secrets/secrets_keys
    echo "Made site/secrets/secrets_keys: without it secrets of webhooks cannot be read. Keep a copy apart from the backups."
fi
if [ ! -e site/secrets/tls_certificate ] && [ ! -e site/secrets/tls_key ]; then
    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 397 -subj "/CN=$2" \
        -addext "subjectAltName=DNS:$2" \
        -keyout site/secrets/tls_key -out site/secrets/tls_certificate 2>/dev/null
    echo "Made a self-signed certificate for $2, good for tests: put another in its place in site/secrets."
fi
if [ ! -e site/settings.env ]; then
    cat >site/settings.env <<SETTINGS
# Settings of this place, over those of ../base/settings.env; docs/settings.md has them all.
MEDSORA_STORAGE_URL=$3
# Of a store that is not Amazon's, or where the service account has no right to the bucket (then the secret s3, too):
#MEDSORA_S3_ENDPOINT_URL=https://s3.example.org
#MEDSORA_S3_REGION=eu-central-1
#MEDSORA_S3_ACCESS_KEY_ID=
#MEDSORA_S3_SECRET_ACCESS_KEY_FILE=/etc/medsora/s3_secret_access_key
# Without components/postgres; the password stays in secrets/postgres_password:
#MEDSORA_DATABASE_URL=postgresql+psycopg://medsora@db.example.org:5432/medsora?sslmode=verify-full
# With components/checkpoints:
#MEDSORA_CHECKPOINTS=/checkpoints/NAME
SETTINGS
    echo "Made site/settings.env."
fi
if [ ! -e site/kustomization.yaml ]; then
    cat >site/kustomization.yaml <<KUSTOMIZATION
apiVersion: kustomize.config.k8s.io/v1beta1
kind: Kustomization
namespace: medsora
resources: [../$1]
components:
  - ../components/postgres
  - ../components/prometheus
  # - ../components/keda
  # - ../components/checkpoints
configMapGenerator:
  - {name: settings, namespace: medsora, behavior: merge, envs: [settings.env]}
secretGenerator:
  - {name: redis, files: [password=secrets/redis_password]}
  - {name: postgres, files: [password=secrets/postgres_password]}
  - {name: sealing, files: [keys=secrets/secrets_keys]}
  # - {name: s3, files: [secret_access_key=secrets/s3_secret_access_key]}
  - {name: tls, type: kubernetes.io/tls, files: [tls.crt=secrets/tls_certificate, tls.key=secrets/tls_key]}
images:
  - {name: medsora-proxy, newName: ${prefix}proxy, newTag: "$tag"}
  - {name: medsora-api, newName: ${prefix}api, newTag: "$tag"}
  - {name: medsora-$worker, newName: ${prefix}$worker, newTag: "$tag"}
KUSTOMIZATION
    echo "Made site/kustomization.yaml. Look it through, then: kubectl apply -k docker/kubernetes/site"
fi
