/** The three dials: their ranges, and where a value lies on a slider. No React. */

export const DIALS = ['eps', 'attn', 'mlp'] as const;
export type Dial = (typeof DIALS)[number];
export type DialValues = Record<Dial, number>;

export const NEUTRAL: DialValues = { eps: 1, attn: 1, mlp: 1 };

/** The dials again, on some layers only: they multiply with those of the whole model. */
export interface Band extends DialValues {
  layers: string; // `0-7`, or blocks of a UNet such as `up.1-3`
}
export const MOST_BANDS = 8;

/** eps is turned on a logarithmic slider: its position is the power of ten. */
export const EPS_EXPONENT = { min: -2, max: 4, step: 0.1 } as const;
export const GAIN = { min: 0.5, max: 1.5, step: 0.01, usefulFrom: 0.8, usefulTo: 1.2 } as const;

export const toPosition = (dial: Dial, value: number): number => (dial === 'eps' ? Math.log10(value) : value);

/** The value at a position, with as many digits as the slider can tell apart. */
export function fromPosition(dial: Dial, position: number): number {
  if (dial !== 'eps') return Number(clamp(position, GAIN.min, GAIN.max).toFixed(2));
  return Number((10 ** clamp(position, EPS_EXPONENT.min, EPS_EXPONENT.max)).toPrecision(2));
}

export function format(dial: Dial, value: number): string {
  if (dial !== 'eps') return `${value.toFixed(2)}×`;
  const digits = value >= 10 ? 0 : value >= 1 ? 1 : 2;
  return `${Number(value.toFixed(digits)).toLocaleString('en-US')}×`;
}

export const isNeutral = (values: DialValues): boolean => DIALS.every((dial) => values[dial] === 1);

/** Bands that say where, and turn something. */
export const turnedBands = (bands: readonly Band[]): readonly Band[] =>
  bands.filter((band) => band.layers.trim() && !isNeutral(band));

/** The wire form, or nothing where nothing is turned: a request without dials runs the plain path. */
export function wireForm(
  values: DialValues,
  bands: readonly Band[] = [],
  own: Record<string, number> = {},
): Record<string, unknown> | undefined {
  const form = { ...turned(values), ...own, ...wireBands(bands) };
  return Object.keys(form).length === 0 ? undefined : form;
}

const turned = (values: DialValues): Partial<DialValues> =>
  Object.fromEntries(DIALS.filter((dial) => values[dial] !== 1).map((dial) => [dial, values[dial]]));

function wireBands(bands: readonly Band[]): { bands?: unknown } {
  const some = turnedBands(bands);
  return some.length === 0 ? {} : { bands: some.map((band) => ({ layers: band.layers.trim(), ...turned(band) })) };
}

/** How far from plain a value is, from 0 to 1: what the pictures show. */
export function strength(dial: Dial, value: number): number {
  if (dial === 'eps')
    return clamp((Math.log10(value) - EPS_EXPONENT.min) / (EPS_EXPONENT.max - EPS_EXPONENT.min), 0, 1);
  return clamp((value - GAIN.min) / (GAIN.max - GAIN.min), 0, 1);
}

function clamp(value: number, low: number, high: number): number {
  return Math.min(high, Math.max(low, value));
}
