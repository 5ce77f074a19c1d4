import { expect, it } from 'vitest';
import { ago, bytes, count, duration, percent } from './format';

it('writes sizes and shares shortly', () => {
  expect([999, 4_200, 4_200_000, 56_000_000, 3_200_000_000].map(bytes)).toEqual([
    '999 B',
    '4 kB',
    '4.2 MB',
    '56 MB',
    '3.2 GB',
  ]);
  expect([812, 49_152, 1_228_800].map(count)).toEqual(['812', '49,152', '1.2 M']);
  expect([0.5, 0.009, 0.0004].map(percent)).toEqual(['50%', '0.9%', '0.04%']);
});

it('writes durations in both languages', () => {
  expect([5, 65, 3_700, 60].map((s) => duration(s, 'en'))).toEqual(['5 s', '1 min 5 s', '1 h 1 min', '1 min']);
  expect([5, 65, 7_200].map((s) => duration(s, 'ko'))).toEqual(['5초', '1분 5초', '2시간']);
});

it('says how long ago', () => {
  expect(ago(0, 'en', 180)).toBe('3 minutes ago');
  expect(ago(0, 'ko', 7_200)).toBe('2시간 전');
});
