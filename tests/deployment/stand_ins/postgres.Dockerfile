# In place of postgres:15-bookworm: Debian's PostgreSQL 15, with the same user, folder and variables.
FROM docker.io/library/debian:bookworm-slim
RUN apt-get update && apt-get install -y --no-install-recommends postgresql-15 \
    && rm -rf /var/lib/apt/lists/* && usermod --non-unique --uid 999 postgres && groupmod --non-unique --gid 999 postgres \
    && install -d -o 999 -g 999 -m 0700 /var/lib/postgresql/data && install -d -o 999 -g 999 -m 3777 /run/postgresql
ENV PATH=/usr/lib/postgresql/15/bin:$PATH
COPY --chmod=0755 postgres.sh /usr/local/bin/postgres.sh
ENTRYPOINT ["postgres.sh"]
