/** How a picture is asked for: the settings, and their wire form. No React. */

export const SCHEDULERS = ['ddim', 'pndm', 'euler', 'euler_a', 'dpm++', 'unipc', 'heun', 'deis'] as const;
export const MOST_PICTURES = 10;

export interface PictureSettings {
  negative: string;
  size: string; // '': the model's own
  steps: number;
  guidance: number;
  scheduler: string | null; // null: the model's own
  seed: number | null; // null: another one each time
  n: number;
  previews: number;
  fast: boolean; // two steps of three take over what is deep
  selfAttention: number; // dials of the UNet alone; the others are in DialValues
  crossAttention: number;
  start: string | null; // a data URL: the picture to begin with
  strength: number;
}

export const DEFAULT_PICTURE: PictureSettings = {
  negative: '',
  size: '',
  steps: 25,
  guidance: 7.5,
  scheduler: null,
  seed: null,
  n: 1,
  previews: 5,
  fast: false,
  selfAttention: 1,
  crossAttention: 1,
  start: null,
  strength: 0.8,
};

export const isSize = (text: string): boolean => text === '' || /^[0-9]{1,4}x[0-9]{1,4}$/.test(text);

/** Without model, prompt and the shared dials. */
export function wirePicture(set: PictureSettings): Record<string, unknown> {
  return {
    n: set.n,
    steps: set.steps,
    guidance: set.guidance,
    partial_images: set.previews,
    ...(set.fast ? { fast: true } : {}),
    ...(set.negative.trim() ? { negative_prompt: set.negative.trim() } : {}),
    ...(set.size ? { size: set.size } : {}),
    ...(set.scheduler ? { scheduler: set.scheduler } : {}),
    ...(set.seed !== null ? { seed: set.seed } : {}),
    ...(set.start ? { image: set.start, strength: set.strength } : {}),
  };
}

/** The two that divide `attn`; nothing where neither is turned. */
export const ownDials = (set: PictureSettings): Record<string, number> => ({
  ...(set.selfAttention !== 1 ? { attn_self: set.selfAttention } : {}),
  ...(set.crossAttention !== 1 ? { attn_cross: set.crossAttention } : {}),
});
