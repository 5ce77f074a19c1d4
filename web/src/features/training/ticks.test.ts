import { expect, it } from 'vitest';
import { ticks } from './ticks';

it('gives round numbers around the values', () => {
  expect(ticks(1.3, 3.4, 5)).toEqual([1, 2, 3, 4]);
  expect(ticks(0, 48, 6)).toEqual([0, 10, 20, 30, 40, 50]);
  expect(ticks(0.012, 0.019, 4)).toEqual([0.01, 0.015, 0.02]);
});

it('has a range even for a single value', () => {
  for (const value of [0, 2.5, 1e-6, -3]) {
    const [low, high] = [ticks(value, value, 5)[0]!, ticks(value, value, 5).at(-1)!];
    expect(low <= value && value <= high && low < high).toBe(true);
  }
});
