import { expect, it } from 'vitest';
import { DEFAULT_PICTURE, isSize, ownDials, wirePicture } from './pictures';
import { DEFAULT_SAMPLING, hasMore, wireSampling } from './sampling';

it('sends of the sampling only what is set', () => {
  expect(hasMore(DEFAULT_SAMPLING)).toBe(false);
  expect(wireSampling(DEFAULT_SAMPLING)).toEqual({ temperature: 0.7, top_p: 0.95, max_tokens: 400 });
  const set = { ...DEFAULT_SAMPLING, topK: 5, seed: 0, stop: ['END'], repetition: 1.1, deterministic: true };
  expect(hasMore(set)).toBe(true);
  expect(wireSampling(set)).toMatchObject({
    top_k: 5,
    seed: 0,
    stop: ['END'],
    repetition_penalty: 1.1,
    deterministic: true,
  });
});

it('sends of a picture only what is set, and the strength only with a picture to begin with', () => {
  expect(wirePicture(DEFAULT_PICTURE)).toEqual({ n: 1, steps: 25, guidance: 7.5, partial_images: 5 });
  const set = { ...DEFAULT_PICTURE, seed: 0, size: '64x64', start: 'data:image/png;base64,AA==', crossAttention: 1.2 };
  expect(wirePicture(set)).toMatchObject({ seed: 0, size: '64x64', image: set.start, strength: 0.8 });
  expect(ownDials(set)).toEqual({ attn_cross: 1.2 });
  expect(['', '64x64', '64', '64 x 64'].map(isSize)).toEqual([true, true, false, false]);
});
