#!/usr/bin/env bash
# Make a certificate authority, and a certificate for RabbitMQ on localhost, in security/certificates.
# usage: security/make_certificates.sh     Later, it renews RabbitMQ's certificate.
set -euo pipefail
cd "$(dirname "$0")"
mkdir -p certificates
chmod 700 certificates  # nobody else on this computer can read what is in it
cd certificates
new_key=(-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes)  # -nodes: without a password

# The authority: its key, and its certificate. Python 3.13 insists on the key usage.
if [ ! -e ca.pem ]; then
    openssl req -x509 "${new_key[@]}" -keyout ca.key -out ca.pem -days 3650 \
        -subj '/CN=Authority of the tutorial' -addext keyUsage=critical,keyCertSign,cRLSign
fi

# RabbitMQ: its key, and a request for a certificate.
openssl req "${new_key[@]}" -keyout server.key -out server.csr -subj /CN=localhost

# The authority signs the certificate. subjectAltName is the name that a script compares with the
# host in its AMQP_URL. The other three lines say what the certificate is for, and who has signed it.
cat >server.ext <<END
subjectAltName = DNS:localhost
extendedKeyUsage = serverAuth
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
END
openssl x509 -req -in server.csr -extfile server.ext -out server.pem -days 365 \
    -CA ca.pem -CAkey ca.key -CAcreateserial

# openssl makes a key that only you can read. In its container, RabbitMQ is another user.
chmod 644 server.key
