import { describe, expect, it } from 'vitest';
import { EPS_EXPONENT, format, fromPosition, isNeutral, NEUTRAL, strength, toPosition, wireForm } from './dials';

describe('eps', () => {
  it('goes from 0.01 to 10,000 on a logarithmic slider, with 1 where it is neutral', () => {
    expect(fromPosition('eps', EPS_EXPONENT.min)).toBe(0.01);
    expect(fromPosition('eps', 0)).toBe(1);
    expect(fromPosition('eps', EPS_EXPONENT.max)).toBe(10_000);
  });

  it('keeps a value that goes to the slider and back', () => {
    for (let position = EPS_EXPONENT.min; position <= EPS_EXPONENT.max; position += EPS_EXPONENT.step) {
      const value = fromPosition('eps', position);
      expect(fromPosition('eps', toPosition('eps', value))).toBe(value);
    }
  });

  it('is written shortly', () => {
    expect([0.01, 0.16, 1, 1.6, 16, 1000, 10_000].map((v) => format('eps', v))).toEqual([
      '0.01×',
      '0.16×',
      '1×',
      '1.6×',
      '16×',
      '1,000×',
      '10,000×',
    ]);
  });
});

describe('gains', () => {
  it('stay within their range, in steps of a hundredth', () => {
    expect(fromPosition('attn', 0.1)).toBe(0.5);
    expect(fromPosition('mlp', 9)).toBe(1.5);
    expect(fromPosition('attn', 0.8 + 0.1 + 0.1)).toBe(1);
    expect(format('attn', 1.1)).toBe('1.10×');
  });
});

describe('what is sent', () => {
  it('is nothing when nothing is turned, and else only what is', () => {
    expect(isNeutral(NEUTRAL)).toBe(true);
    expect(wireForm(NEUTRAL)).toBeUndefined();
    expect(wireForm({ eps: 100, attn: 1, mlp: 0.9 })).toEqual({ eps: 100, mlp: 0.9 });
    const bands = [
      { ...NEUTRAL, layers: ' 0-7 ', attn: 1.1 },
      { ...NEUTRAL, layers: '8-9' }, // turns nothing
      { ...NEUTRAL, layers: '', mlp: 2 }, // says not where
    ];
    expect(wireForm(NEUTRAL, bands)).toEqual({ bands: [{ layers: '0-7', attn: 1.1 }] });
    expect(wireForm(NEUTRAL, bands.slice(1))).toBeUndefined();
    expect(wireForm({ ...NEUTRAL, mlp: 2 }, [], { attn_self: 0.9 })).toEqual({ mlp: 2, attn_self: 0.9 });
  });
});

it('shows strength between 0 and 1', () => {
  expect(strength('eps', 1e9)).toBe(1);
  expect(strength('attn', 1)).toBe(0.5);
});
