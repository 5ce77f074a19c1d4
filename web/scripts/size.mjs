// All scripts and styles of the built page, compressed as a server would. Fails above the limit.
import { readdirSync, readFileSync } from 'node:fs';
import { gzipSync } from 'node:zlib';

const LIMIT_KB = 600;
const dist = new URL('../dist/', import.meta.url);
const files = readdirSync(dist, { recursive: true }).filter((name) => /\.(js|css)$/.test(name));
let total = 0;
for (const name of files.sort()) {
  const bytes = gzipSync(readFileSync(new URL(name, dist))).length;
  total += bytes;
  console.log(`${(bytes / 1000).toFixed(1).padStart(8)} kB  ${name}`);
}
console.log(
  `${(total / 1000).toFixed(1).padStart(8)} kB  in ${files.length} files, compressed; the limit is ${LIMIT_KB} kB`,
);
if (files.length === 0 || total > LIMIT_KB * 1000) process.exit(1);
