import { api, download, upload } from '@/lib/api';
import { model } from '@/types/api';

const path = (id: string) => id.split('/').map(encodeURIComponent).join('/');

export const deleteModel = (id: string): Promise<void> => api.delete(`/v1/models/${path(id)}`);

export type LoraForm = 'diffusers' | 'kohya';

/** peft's zip of a model of text; of one that draws, a LoRA in the form that is named. */
export const exportModel = (id: string, form?: LoraForm): Promise<void> =>
  download(
    `/v1/models/${path(id)}/export${form ? `?format=${form}` : ''}`,
    `${id.replace(/[^\w.-]/g, '-')}${form ? '.safetensors' : '.zip'}`,
  );

export interface Import {
  file: File;
  base: string;
  suffix: string;
}

export const importModel = ({ file, base, suffix }: Import, onProgress: (share: number) => void) => {
  const form = new FormData();
  form.append('model', base);
  if (suffix) form.append('suffix', suffix);
  form.append('file', file);
  return upload('/v1/models/import', form, model, onProgress);
};
