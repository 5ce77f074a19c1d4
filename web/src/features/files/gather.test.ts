import { unzipSync } from 'fflate';
import { expect, it } from 'vitest';
import { gather, isZip, picked, zipped, type Picked } from './gather';

const file = (path: string, text = path): Picked => ({ path, file: new File([text], path.split('/').at(-1) ?? path) });
const read = async (zip: File) => {
  const found = unzipSync(new Uint8Array(await zip.arrayBuffer()));
  return Object.fromEntries(Object.entries(found).map(([name, bytes]) => [name, new TextDecoder().decode(bytes)]));
};

it('takes pictures and their captions, counts what stays behind, and leaves out what systems hide away', () => {
  const found = gather(
    ['d/1.PNG', 'd/1.txt', 'd/2.jpeg', 'd/metadata.jsonl', 'd/notes.txt', 'd/.DS_Store', '__MACOSX/d/1.PNG'].map(
      (path) => file(path),
    ),
  );
  expect(found.pictures.map(({ path }) => path)).toEqual(['d/1.PNG', 'd/2.jpeg']);
  expect(found.captions.map(({ path }) => path)).toEqual(['d/1.txt', 'd/metadata.jsonl']);
  expect(found.leftOut).toBe(1);
});

it('keeps two pictures of one name apart', () => {
  const two = [...picked([new File(['a'], 'Cat.png'), new File(['b'], 'cat.png')])];
  expect(gather(two).pictures.map(({ path }) => path)).toEqual(['Cat.png', 'cat-2.png']);
});

it('zips pictures and captions as they are, and says how far it is', async () => {
  const told: number[] = [];
  const zip = await zipped(gather([file('멍/1.png', 'one'), file('멍/1.txt', 'a dog')]), 'ignored', 'dog', (n) =>
    told.push(n),
  );
  expect(zip.name).toBe('dog.zip');
  expect(isZip(zip)).toBe(true);
  expect(await read(zip)).toEqual({ '멍/1.png': 'one', '멍/1.txt': 'a dog' });
  expect(told).toEqual([0]);
});

it('writes one caption for all beside them, and none where nobody gave one', async () => {
  const two = gather([file('1.png'), file('2.webp')]);
  const captions = (await read(await zipped(two, ' a "red" dog ', '', () => undefined)))['metadata.jsonl'] ?? '';
  expect(
    captions
      .trim()
      .split('\n')
      .map((line) => JSON.parse(line) as unknown),
  ).toEqual([
    { file_name: '1.png', text: 'a "red" dog' },
    { file_name: '2.webp', text: 'a "red" dog' },
  ]);
  const bare = await zipped(two, ' ', '', () => undefined);
  expect([bare.name, Object.keys(await read(bare))]).toEqual(['pictures.zip', ['1.png', '2.webp']]);
});
