import { ErrorNote } from '@/components/ErrorNote';
import { bytes } from '@/lib/format';
import { Button, Group, Progress, Text, TextInput } from '@mantine/core';
import { useMutation } from '@tanstack/react-query';
import { useMemo, useState } from 'react';
import { useTranslation } from 'react-i18next';
import { gather, zipped, type Picked } from '@/features/files/gather';
import css from './PictureReport.module.css';

const SHOWN = 12;

interface Props {
  picked: readonly Picked[];
  onZip: (zip: File) => void;
  onDismiss: () => void;
}

/** Pictures that were picked one by one, before they go as one zip. */
export function GatherPictures({ picked, onZip, onDismiss }: Props) {
  const { t } = useTranslation();
  const gathered = useMemo(() => gather(picked), [picked]);
  const { pictures, captions, leftOut } = gathered;
  const [name, setName] = useState(() => folderOf(picked) ?? '');
  const [caption, setCaption] = useState('');
  const [done, setDone] = useState(0);
  const zipping = useMutation({ mutationFn: () => zipped(gathered, caption, name, setDone), onSuccess: onZip });
  const size = bytes(pictures.reduce((sum, { file }) => sum + file.size, 0));
  const told = [
    t('pictured.gathered', { count: pictures.length, size }),
    captions.length > 0 ? t('pictured.captionsToo', { count: captions.length }) : null,
  ];
  return (
    <section className={css.gathered} aria-label={t('pictured.gatheredTitle')}>
      <Text fw={600} size="sm" role="status">
        {pictures.length > 0 ? told.filter(Boolean).join(', ') : t('pictured.noneFound')}
      </Text>
      {leftOut > 0 ? (
        <Text size="sm" c="dimmed">
          {t('pictured.leftOut', { count: leftOut })}
        </Text>
      ) : null}
      <Thumbnails picked={pictures.slice(0, SHOWN)} />
      {pictures.length > 0 ? (
        <>
          <TextInput
            label={t('pictured.name')}
            placeholder="pictures"
            value={name}
            onChange={(event) => setName(event.currentTarget.value)}
            maxLength={100}
            autoComplete="off"
          />
          {captions.length === 0 ? (
            <TextInput
              label={t('pictured.caption')}
              description={t('pictured.captionText')}
              value={caption}
              onChange={(event) => setCaption(event.currentTarget.value)}
              maxLength={2000}
              autoComplete="off"
            />
          ) : null}
        </>
      ) : null}
      {zipping.error ? <ErrorNote error={zipping.error} /> : null}
      {zipping.isPending ? (
        <div role="status">
          <Text size="sm">{t('pictured.zipping', { done, total: pictures.length })}</Text>
          <Progress value={(100 * done) / pictures.length} aria-label={t('pictured.gatheredTitle')} mt={6} />
        </div>
      ) : (
        <Group gap="sm">
          {pictures.length > 0 ? <Button onClick={() => zipping.mutate()}>{t('pictured.zipUpload')}</Button> : null}
          <Button variant="default" onClick={onDismiss}>
            {t('pictured.dismiss')}
          </Button>
        </Group>
      )}
    </section>
  );
}

function Thumbnails({ picked }: { picked: readonly Picked[] }) {
  return (
    <ul className={css.thumbs}>
      {picked.map(({ path, file }) => (
        <li key={path}>
          <img className={css.thumb} ref={(image) => shownIn(image, file)} alt={path} />
        </li>
      ))}
    </ul>
  );
}

/** A ref: what it returns lets go of the picture again. */
function shownIn(image: HTMLImageElement | null, file: File): (() => void) | undefined {
  if (!image) return undefined;
  const url = URL.createObjectURL(file);
  image.src = url;
  return () => URL.revokeObjectURL(url);
}

const folderOf = (picked: readonly Picked[]): string | undefined => {
  const [first, ...rest] = picked[0]?.path.split('/') ?? [];
  return rest.length > 0 ? first : undefined;
};
