-- Run once by PostgreSQL's image, where its volume is empty: the relay's user and database.
\getenv password POSTGRES_PASSWORD
CREATE ROLE imfine LOGIN PASSWORD :'password';
CREATE DATABASE imfine OWNER imfine ENCODING 'UTF8' TEMPLATE template0;
REVOKE ALL ON DATABASE imfine FROM PUBLIC;
-- Whoever may do everything comes in from inside the container alone, where no password is asked for.
ALTER ROLE postgres PASSWORD NULL;
