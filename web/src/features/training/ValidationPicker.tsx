import { Select } from '@mantine/core';
import { useQuery } from '@tanstack/react-query';
import { useTranslation } from 'react-i18next';
import type { Piece } from './LayersForm';
import { filesQuery } from '@/features/files/queries';

/** A second of the uploaded files, which the model is tested with and never learns from. */
export function ValidationPicker({ form, set }: Piece) {
  const { t } = useTranslation();
  const files = useQuery(filesQuery('fine-tune')).data ?? [];
  const ofPictures = form.kind === 'pictures';
  const training = files.find((each) => each.id === form.fileId);
  const others = files.filter(
    (each) =>
      each.id !== form.fileId &&
      each.kind === (form.kind ?? 'text') &&
      (!training || Boolean(each.captioned) === Boolean(training.captioned)),
  );
  if (others.length === 0) return null;
  return (
    <Select
      label={t(ofPictures ? 'pictured.validation' : 'hyper.validation')}
      description={t('hyper.validationText')}
      value={others.some((each) => each.id === form.validationId) ? form.validationId : ''}
      onChange={(id) => set({ validationId: id || null })}
      data={[
        { value: '', label: t('hyper.validationNone') },
        ...others.map((each) => ({
          value: each.id,
          label: `${each.filename} · ${t(ofPictures ? 'pictured.rows' : 'training.rows', { count: each.rows })}`,
        })),
      ]}
      allowDeselect={false}
    />
  );
}
