import { expect, it } from 'vitest';
import { arePictures, asPicture, some } from './samples';

const PICTURE = 'data:image/webp;base64,UklGRg==';

it('shows as a picture only what loads nothing from anywhere', () => {
  expect(asPicture(PICTURE)).toBe(PICTURE);
  for (const other of ['https://a.example/x.png', 'data:image/svg+xml;base64,AAAA', `${PICTURE}" x="`, '', undefined])
    expect(asPicture(other)).toBeNull();
});

it('tells pictures from words', () => {
  expect(arePictures([{ step: 1, answers: [{ prompt: 'cat', answer: PICTURE }] }])).toBe(true);
  expect(arePictures([{ step: 1, answers: [{ prompt: 'Ahoy?', answer: 'Arr!' }] }])).toBe(false);
});

it('keeps the first and the last of many', () => {
  const steps = Array.from({ length: 100 }, (_, i) => i);
  expect(some(steps)).toHaveLength(8);
  expect([some(steps)[0], some(steps).at(-1)]).toEqual([0, 99]);
  expect(some([1, 2, 3])).toEqual([1, 2, 3]);
});
