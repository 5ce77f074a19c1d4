// Beside each file of the built page its compressed forms, which the relay serves as they are.
import { readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { brotliCompressSync, constants, gzipSync } from 'node:zlib';

const dist = new URL('../dist/', import.meta.url);
for (const name of readdirSync(dist, { recursive: true })) {
  if (!/\.(js|css|svg)$/.test(name)) continue;
  const file = new URL(name, dist);
  const content = readFileSync(file);
  writeFileSync(new URL(`${name}.gz`, dist), gzipSync(content, { level: 9 }));
  const options = { params: { [constants.BROTLI_PARAM_QUALITY]: 9 } };
  writeFileSync(new URL(`${name}.br`, dist), brotliCompressSync(content, options));
}
